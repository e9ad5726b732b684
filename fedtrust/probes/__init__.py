"""What is measured, on what, and by whom."""
