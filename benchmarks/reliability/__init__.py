"""Trials of what several processes and their checkpoints withstand: `make reliability`, explained in docs/reliability.md."""
