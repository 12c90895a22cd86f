"""`report.html`: one training run on one page that needs nothing else: curves, where the adapter sits, samples.

`deltatune.report.page.write_report(result)` writes it; `deltatune.report.sites.adapter_map(model)` is its map as data.
"""
