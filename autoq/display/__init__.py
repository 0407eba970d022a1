"""What people see in a terminal: numbers, tables of stored data, and the progress of a study."""
