"""The papers' tables run again: a row is a recipe, and what was measured stands beside what the paper prints."""
