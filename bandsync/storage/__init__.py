"""What is true: the storages, behind one interface."""
