"""What a run survives: every fault of docs/faults.md, provoked and recorded."""
