"""The rendered world: tables with a few objects, drawn by VTK, described in words.

vocabulary   the kinds, colours, sizes, finishes, and the held-out pairs
world        what a scene is, and how one is sampled from (seed, split, index)
camera       the pinhole camera
meshes       the twelve kinds as triangle meshes
surfaces     table and wall patterns
gl           the few VTK objects the renderer is made of
shadows      soft shadows by shearing
render       colour pass and id pass
masks        boxes, polygons and run lengths of a mask
observed     what can be seen of a scene
phrases      phrases for things, and what they match
relations    left of, behind, between, larger: yes, no, or too close to call
expressions  referring expressions that a person would find unambiguous
absent       phrases that nothing in a scene fits
captions     grounded captions, region descriptions, conversations
records      one scene from its number to its record
writers      the public annotation formats
make_data    the command line
"""
