"""What every room needs: checks of arguments, names of extras, threads."""
