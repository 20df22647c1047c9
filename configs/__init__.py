"""The configuration tree; a package so that the installed command finds it as `zoo.configs`."""
