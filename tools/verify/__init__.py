"""Every component beside the implementation that it must equal: `rcmae verify`, and what the tests ask of it."""
