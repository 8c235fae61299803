"""The conformance kit as a pytest plugin: options, Hypothesis profiles, the `kit` fixture."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

from adaattn_core.errors import AdaAttnError
from adaattn_core.plugins.registry import Registration, default_registry, get_backend
from adaattn_core.testing.homes import ArrayHome
from adaattn_core.testing.kit import Kit
from adaattn_core.testing.sabotage import SABOTAGES, sabotage

_COMMON = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of the kit."""
    group = parser.getgroup("adaattn", "AdaAttn conformance kit")
    group.addoption(
        "--adaattn-backend",
        default="numpy",
        metavar="NAME",
        help="backend under test: a registered name, or module:factory",
    )
    group.addoption(
        "--adaattn-profile",
        default="dev",
        choices=("dev", "ci", "deep"),
        help="Hypothesis profile: dev (fast), ci (reproducible), deep (10,000 examples)",
    )
    group.addoption(
        "--adaattn-arrays",
        default="numpy",
        metavar="MODULE[:DEVICE]",
        help="library and device of the arrays handed over, e.g. torch:cuda (default: numpy)",
    )
    group.addoption(
        "--adaattn-sabotage",
        default=None,
        choices=sorted(SABOTAGES),
        help="break the backend on purpose: the kit must then fail",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Register and load the Hypothesis profile."""
    settings.register_profile("adaattn-dev", max_examples=20, **_COMMON)  # type: ignore[arg-type]
    settings.register_profile(
        "adaattn-ci",
        max_examples=20,
        derandomize=True,
        database=None,
        print_blob=True,
        **_COMMON,  # type: ignore[arg-type]
    )
    settings.register_profile("adaattn-deep", max_examples=10_000, **_COMMON)  # type: ignore[arg-type]
    settings.load_profile(f"adaattn-{config.getoption('--adaattn-profile')}")


def pytest_report_header(config: pytest.Config) -> str:
    """Say what is being judged."""
    broken = config.getoption("--adaattn-sabotage")
    return (
        f"adaattn kit: backend {config.getoption('--adaattn-backend')}"
        f", profile {config.getoption('--adaattn-profile')}"
        f", arrays {config.getoption('--adaattn-arrays')}"
        + (f", sabotaged: {broken}" if broken else "")
    )


@pytest.fixture(scope="session")
def kit(request: pytest.FixtureRequest) -> Kit:
    """Return the backend under test."""
    name = request.config.getoption("--adaattn-backend")
    backends = default_registry().backends
    if ":" in name and name not in backends:
        backends[name] = Registration(name, name, plugin="--adaattn-backend")
    try:
        backend = get_backend(name)
        home = ArrayHome.parse(request.config.getoption("--adaattn-arrays"))
    except (AdaAttnError, ImportError) as error:
        pytest.exit(f"the kit cannot start\n{error}", returncode=pytest.ExitCode.USAGE_ERROR)
    broken = request.config.getoption("--adaattn-sabotage")
    if broken is not None:
        backends[name].instance = sabotage(broken, backend)
    return Kit(name, home)
