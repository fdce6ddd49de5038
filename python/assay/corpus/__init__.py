"""Shards in, score tables out.

Importing this package needs only numpy and pyarrow; the modules that open files import fsspec themselves.
"""

from assay.corpus.tables import ROW_AND_ID, make_table, read_metadata, score_schema

__all__ = ["ROW_AND_ID", "make_table", "read_metadata", "score_schema"]
