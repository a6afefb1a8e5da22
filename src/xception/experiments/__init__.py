"""The paper's tables and figures as experiments: one file each, which says the command, the time, and what came out."""
