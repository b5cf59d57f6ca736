"""Recipes: the schema, the loader, the table of operators, planning and running."""
