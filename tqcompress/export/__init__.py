"""Exports of a compressed model to other runtimes, one file each."""
