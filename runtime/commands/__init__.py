"""What each ``goslet`` command does: one module a command, each with NAME, SUMMARY, `add_arguments` and `execute`."""
