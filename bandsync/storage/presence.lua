-- Writes a server's presence, unless another live server of the same name goes before us.
--
-- KEYS  1 the entry
-- ARGV  1 our boot id   2 our entry   3 expiry in milliseconds
--       4 '1' if the last entry was ours: whoever stands there now has written since
-- Returns the entry that keeps us out, otherwise nothing. To look and to write is one step: who
-- yields must not hide the one who stays.
local stored = redis.call('GET', KEYS[1])
if stored and ARGV[4] == '1' then
  local readable, entry = pcall(cjson.decode, stored)
  if readable and type(entry) == 'table' and type(entry.bootId) == 'string'
      and entry.bootId < ARGV[1] then
    return stored
  end
end
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
return false
