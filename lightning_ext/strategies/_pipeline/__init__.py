"""What the pipeline strategy is made of.

``_build`` splits a module: ``_layers`` finds what is split and ``_split`` where, ``_parts`` takes
out what other ranks have, ``_stage`` makes layers a module, ``_data_parallel`` and ``_shared``
reduce gradients. A step is in ``_training``: ``_micro_batches`` cuts the batch, ``_redirect``
catches the call of the submodule, ``_rehearsal`` finds out shapes (and, by ``_outcomes``, errors),
``_engine`` runs torch's schedule, ``_logged`` and ``_message`` tell all ranks. ``_evaluation`` is a
call outside of steps.
"""
