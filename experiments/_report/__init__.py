"""Self-contained HTML pages: an evaluation's report and a dataset's. `page.py` puts their parts together."""
