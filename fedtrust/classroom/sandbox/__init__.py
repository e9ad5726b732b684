"""Runs what students hand in without trusting a line of it; see docs/sandbox.md.

`proxy` holds what stands for a submission in a run (a behaviour, a server rule, an audit, an evasion), `backends` what keeps it in,
`static` the friendly check beforehand. What runs inside (`launcher`, `worker`, `player`, `parts`) is not imported by the host.
"""
