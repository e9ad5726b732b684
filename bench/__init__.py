"""Measurements, side by side in one run; nothing here is imported by fedtrust."""

import fedtrust  # noqa: F401 -- before torch, as on the command line: it says how torch's idle threads wait
