"""The zoo's own components, stated in the same manifest a plugin uses. Data only: nothing heavy is imported here."""

from __future__ import annotations

from zoo.plugin import Plugin

PLUGIN = Plugin(name="zoo", components=())
