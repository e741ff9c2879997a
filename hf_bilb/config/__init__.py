"""Options, YAML and users' own code, checked strictly. Imports none of the heavy libraries."""
