"""`fremap bench`: each speed that fremap claims, measured beside what it is compared with."""
