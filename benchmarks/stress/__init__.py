"""What the library promises, tried at length: ``python -m benchmarks.stress``.

Every function tries one promise and returns or yields rows: ``what`` was tried, the ``result``
in words, what was ``asked``, whether that is ``ok``, and the numbers behind it. The tests call
them with small numbers.
"""
