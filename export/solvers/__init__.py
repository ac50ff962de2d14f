"""Small solvers whose behaviour theorems describe: matrix sensing and diagonal linear networks.

They need numpy alone, so that they run on the device that recalibrates as well as where a model is exported.
"""
