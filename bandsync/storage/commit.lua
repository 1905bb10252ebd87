-- Compare-and-set: replaces the base of a change by the change, if the base is still stored.
-- Atomic per session. On success it also restarts the expiry and publishes the change.
--
-- KEYS  1 hash of the session
-- ARGV  1-3 epoch, version, event id of the base; three empty texts if there was no session
--       4-6 epoch, version, event id of the change
--       7 expiry in seconds   8 PUBLISH or SPUBLISH   9 channel of the session   10 message
--       11 number of fields to delete, their names, then names and values of the fields to set
-- Returns 1 if it was written, otherwise the stored hash as HGETALL returns it.
--
-- The channel has the slot of the key, but must not be declared in KEYS: while a Cluster migrates
-- the slot, a command with a key that does not exist is rejected (TRYAGAIN) until the end.
local key = KEYS[1]
local epoch, version, event_id = ARGV[4], ARGV[5], ARGV[6]
local expiry_s, publish, channel, message = ARGV[7], ARGV[8], ARGV[9], ARGV[10]
local first_deleted = 12

local stored = redis.call('HMGET', key, 'epoch', 'version', 'eventId')
local exists = stored[1] or stored[2] or stored[3] or redis.call('EXISTS', key) == 1
if exists then
  for i = 1, 3 do
    if stored[i] ~= ARGV[i] then
      return redis.call('HGETALL', key)
    end
  end
elseif ARGV[1] ~= '' then
  return {}
end

local first_set = first_deleted + tonumber(ARGV[11])
for i = first_deleted, first_set - 1 do
  redis.call('HDEL', key, ARGV[i])
end
redis.call('HSET', key, 'epoch', epoch, 'version', version, 'eventId', event_id)
-- In batches: unpack accepts a few thousand values at the most.
for i = first_set, #ARGV, 1000 do
  redis.call('HSET', key, unpack(ARGV, i, math.min(i + 999, #ARGV)))
end
redis.call('EXPIRE', key, expiry_s)
redis.call(publish, channel, message)
return 1
