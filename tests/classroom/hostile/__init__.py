"""Submissions that mean harm, and what must come of them; played only inside a sandbox inside a private namespace (see `outer`)."""
