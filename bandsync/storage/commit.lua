-- Puts a change in the place of the state it was made from, if that is still what is stored.
--
-- KEYS  1 session hash
-- ARGV  1-3 epoch, version, event id of the base; three empty texts if there was none
--       4-6 epoch, version, event id of the change
--       7 expiry in seconds   8 PUBLISH or SPUBLISH   9 channel of its events   10 message for it
--       11 number of fields to delete, their names, then names and values of the fields to set
-- Returns 1 if it was written, otherwise all that is stored, as HGETALL does.
--
-- The channel has the slot of the key, but it must not be declared as one: while a Cluster hands
-- the slot over, a command with a key that does not exist is refused (TRYAGAIN) to the end of that.
local stored = redis.call('HMGET', KEYS[1], 'epoch', 'version', 'eventId')
local known = stored[1] or stored[2] or stored[3] or redis.call('EXISTS', KEYS[1]) == 1
if known then
  for i = 1, 3 do
    if stored[i] ~= ARGV[i] then
      return redis.call('HGETALL', KEYS[1])
    end
  end
elseif ARGV[1] ~= '' then
  return {}
end
local deleted = tonumber(ARGV[11])
for i = 12, 11 + deleted do
  redis.call('HDEL', KEYS[1], ARGV[i])
end
redis.call('HSET', KEYS[1], 'epoch', ARGV[4], 'version', ARGV[5], 'eventId', ARGV[6])
-- In parts: unpack takes some thousands at the most.
for i = 12 + deleted, #ARGV, 1000 do
  redis.call('HSET', KEYS[1], unpack(ARGV, i, math.min(i + 999, #ARGV)))
end
redis.call('EXPIRE', KEYS[1], ARGV[7])
redis.call(ARGV[8], ARGV[9], ARGV[10])
return 1
