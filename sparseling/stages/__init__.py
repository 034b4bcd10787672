"""The kinds of stage that a recipe may have: each a function from named inputs to a folder."""
