"""What a run needs around the mathematics: folder, checkpoints, metrics, progress, devices, tables and report.

Nothing here is imported by the numerical core, and nothing here knows a method. Import from the submodules:
`checkpoint` (the only file that imports Orbax), `folder`, `mesh`, `metrics`, `naturalness`, `progress`, `report` and `tables`.
"""
