"""Several runs beside each other: read from a cluster or from stores, as a table, and as a page of HTML."""
