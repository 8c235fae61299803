"""Planning on the device: probe, judge, decide, gather, pool, attend, certify, escalate."""
