"""Where the images come from: find a copy of the data set in any form, verify it, fetch it, write one."""
