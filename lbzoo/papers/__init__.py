"""The tables and setups of the four papers, as data. README.md in this folder describes the format."""

from lbzoo.papers.reading import PAPERS, find_rows, find_table, load_paper

__all__ = ["PAPERS", "find_rows", "find_table", "load_paper"]
