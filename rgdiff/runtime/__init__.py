"""What a run needs around the mathematics: folder, checkpoints, metrics, progress, devices and report.

Nothing here is imported by the numerical core, and nothing here knows a method. Import from the submodules:
`checkpoint` (the only file that imports Orbax), `folder`, `mesh`, `metrics`, `progress` and `report`.
"""
