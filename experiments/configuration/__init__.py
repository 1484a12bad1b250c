"""What can be chosen about a run, and what follows from the choices."""
