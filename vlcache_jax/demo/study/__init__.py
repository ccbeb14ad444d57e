"""The fidelity study: what every cache method costs in accuracy, at every budget, on the demo checkpoint.

tasks      held-out samples of the demo's tasks as batches, and how their answers are scored
recording  the prompts' queries, keys and values, computed once and replayed to every method
answers    with the question in the prompt that is compressed, or asked afterwards
oracle     what the answer's own rows attend to, and policies that keep just that
methods    the grid
measure    what of that attention a state holds
results    JSON lines that an interrupted run goes on with
run        all of it in order
summary    tables;  plots, heat_maps: pictures
"""
