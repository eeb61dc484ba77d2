"""Published claims, checked by name: ``mupjax reproduce``.

| module | is |
|---|---|
| `target` | the records: a target, its claims, what was found |
| `registry` | all targets by name |
| `runner` | runs a target in a folder of its own and writes what it found |
| `page` | the HTML page of a run |
| any other | one target, its `TARGET` |
"""
