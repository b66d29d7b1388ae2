-- Agree on what is added to a server's TIME after that has jumped. The first word stands.
-- KEYS[1] clock (hash: run id of a server -> microseconds)
-- ARGV[1] run id of this server   ARGV[2] microseconds that were added before   ARGV[3] those that are proposed
-- Returns what is agreed on: somebody else may have noticed before.
local agreed = redis.call('HGET', KEYS[1], ARGV[1])
if agreed and agreed ~= ARGV[2] then return agreed end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[3])
return ARGV[3]
