"""The recipes that ship with tqcompress, as YAML files."""
