"""The command line: each command is one small file over the rooms above. Start: `xception.cli.main.main`."""
