#!/bin/sh
# Everything that needs a device: tests, the conformance kit, compute-sanitizer, figures.
#
#     tests/cuda/gpu_suite.sh [OUT [GROUP ...]]
#
# Run from the repository's root with the package and torch installed. Logs go to OUT (build/gpu);
# GROUPs restrict what benchmarks/gpu_check_sm80.py does.
out=${1:-build/gpu}
[ $# -gt 0 ] && shift
mkdir -p "$out"
python=${PYTHON:-python3}
failed=0

finish() { # NAME STATUS
    if [ "$2" -eq 0 ]; then echo "ok      $1"; else echo "FAILED  $1"; failed=1; fi
}

timeout 120 "$python" -m pytest -q -m gpu tests/cuda >"$out/tests.log" 2>&1 &
tests=$!
timeout 150 "$python" -m pytest -q -n 10 -p no:benchmark -p adaattn_core.testing.pytest_plugin \
    --pyargs adaattn_core.testing.conformance \
    --adaattn-backend cuda --adaattn-arrays torch:cuda >"$out/kit.log" 2>&1 &
kit=$!
"$python" benchmarks/gpu_check_sm80.py --group sanitize >/dev/null 2>&1 # fills the cache
for tool in memcheck racecheck synccheck; do
    timeout 120 compute-sanitizer --tool $tool --error-exitcode 9 \
        "$python" benchmarks/gpu_check_sm80.py --group sanitize >"$out/$tool.log" 2>&1
    finish "compute-sanitizer $tool" $?
done
"$python" benchmarks/gpu_check_facts.py >/dev/null 2>&1
for tool in memcheck racecheck synccheck; do
    timeout 120 compute-sanitizer --tool $tool --report-api-errors no --error-exitcode 9 \
        "$python" benchmarks/gpu_check_facts.py >"$out/facts_$tool.log" 2>&1
    finish "compute-sanitizer $tool, facts" $?
done
for tool in memcheck racecheck synccheck; do # PyTorch asks the driver in vain: no API errors
    timeout 120 compute-sanitizer --tool $tool --report-api-errors no --error-exitcode 9 \
        "$python" benchmarks/gpu_check_sm90.py --profile "128/128 2x128 bf16" --length 1024 \
        --causal >"$out/sm90_$tool.log" 2>&1
    finish "compute-sanitizer $tool, sm90" $?
done
wait $tests; finish "tests" $?
wait $kit; finish "conformance kit" $?
timeout 60 "$python" benchmarks/gpu_host_time.py >"$out/host_time.json" 2>"$out/host_time.log"
finish "host time" $?
timeout 240 "$python" benchmarks/gpu_check_sm80.py --out "$out" ${1:+--only "$@"} >"$out/sm80.log" 2>&1
finish "sm80 checks and timings" $?
exit $failed
