"""The specs that ship with AutoQ: YAML files, found by name with `autoq search NAME`."""
