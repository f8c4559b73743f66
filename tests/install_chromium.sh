#!/bin/sh
# The browser for tests/test_review_page.py: Debian's, where none is there and this user may install it.
for name in chromium chromium-browser google-chrome; do
    command -v "$name" >/dev/null && exit 0
done
if command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
    { apt-get update -qq && apt-get install -qq -y --no-install-recommends chromium; } >/dev/null 2>&1 && exit 0
    echo "Debian's chromium could not be installed: the review page's tests will be skipped"
else
    echo "no chromium here: the review page's tests will be skipped (as root, apt-get install chromium)"
fi
