"""What the library is used on: images, sequences, molecules; each a spec, its data, its encoding and its rewards.

A domain assumes nothing of samplers and tuners: it hands out arrays and rewards. Data sets are read when they are asked
for, from ordinary packages or from files by path, and nothing is downloaded.
"""
