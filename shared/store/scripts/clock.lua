-- Agree on what is added to this server's TIME to get the common time. The first word stands; older servers' go.
-- KEYS[1] clock (hash: run id of a server -> microseconds)
-- ARGV[1] run id of this server   ARGV[2] microseconds that are proposed, '' by whoever has no common time yet
-- Returns what is agreed on, or '' while it is not: somebody has lived by another server's time, and will say.
local agreed = redis.call('HGET', KEYS[1], ARGV[1])
if agreed then return agreed end
local proposal = ARGV[2]
if proposal == '' then
  if redis.call('EXISTS', KEYS[1]) == 1 then return '' end
  proposal = '0'
end
redis.call('DEL', KEYS[1])
redis.call('HSET', KEYS[1], ARGV[1], proposal)
return proposal
