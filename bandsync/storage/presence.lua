-- Writes a server's presence entry, unless another live server with the same SERVER_ID has it.
-- Reading and writing is one step: the server that yields must not overwrite the other's entry.
--
-- KEYS  1 presence entry
-- ARGV  1 our boot id   2 our entry   3 expiry in milliseconds
--       4 '1' if we wrote the previous entry: then a foreign entry was written by a live server
-- Returns the entry of the server that we yield to, otherwise nothing. The one of two live servers
-- with the smaller boot id stays.
local key = KEYS[1]
local boot_id, entry, expiry_ms, owned = ARGV[1], ARGV[2], ARGV[3], ARGV[4] == '1'

local stored = redis.call('GET', key)
if stored and owned then
  local readable, other = pcall(cjson.decode, stored)
  if readable and type(other) == 'table' and type(other.bootId) == 'string'
      and other.bootId < boot_id then
    return stored
  end
end
redis.call('SET', key, entry, 'PX', expiry_ms)
return false
