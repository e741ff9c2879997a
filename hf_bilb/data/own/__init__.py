"""Data of one's own: files of a table, or a set on the hub, with inputs and tasks named by their columns."""
