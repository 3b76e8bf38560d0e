"""The rendered world: tables with a few objects, drawn by VTK, described in words.

vocabulary  the kinds, colours, sizes, finishes, and the held-out pairs
world       what a scene is, and how one is sampled from (seed, split, index)
meshes      the twelve kinds as triangle meshes
surfaces    table and wall patterns
render      colour pass, id pass and soft shadows
masks       boxes and polygons of a mask
expressions referring expressions that a person would find unambiguous
captions    grounded captions, region descriptions, conversations
writers     the public annotation formats
make_data   the command line
"""
