-- Puts a change in the place of the state it was made from, if that is still what is stored.
--
-- KEYS  1 session hash   2 channel of its events
-- ARGV  1-3 epoch, version, event id of the base; three empty texts if there was none
--       4-6 epoch, version, event id of the change
--       7 expiry in seconds   8 message for the channel
--       9 number of fields to delete, their names, then names and values of the fields to set
-- Returns 1 if it was written, otherwise all that is stored, as HGETALL does.
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
local deleted = tonumber(ARGV[9])
for i = 10, 9 + deleted do
  redis.call('HDEL', KEYS[1], ARGV[i])
end
redis.call('HSET', KEYS[1], 'epoch', ARGV[4], 'version', ARGV[5], 'eventId', ARGV[6])
-- In parts: unpack takes some thousands at the most.
for i = 10 + deleted, #ARGV, 1000 do
  redis.call('HSET', KEYS[1], unpack(ARGV, i, math.min(i + 999, #ARGV)))
end
redis.call('EXPIRE', KEYS[1], ARGV[7])
redis.call('PUBLISH', KEYS[2], ARGV[8])
return 1
