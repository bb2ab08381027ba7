"""What is wrong with a device map: the values, and what its names, its spelling and source code show."""
