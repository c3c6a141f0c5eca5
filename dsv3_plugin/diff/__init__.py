"""`dsv3 diff`: where two programs first part that should print the same log-probabilities, and why.

It looks in the order in which one thing causes another: inputs (`inputs`), weights (`weights`), the formula of the
log-probability (`formulas`), then the model's layers and operations (`layers`). `sides` reads what it compares,
`samples` defines what any host can write.
"""
