"""Subcommands of `trl-gym` that do more than start a server: one file each, imported when it runs."""
