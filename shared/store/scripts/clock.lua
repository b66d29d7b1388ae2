-- Agree on what is added to this server's TIME to get the common time. The first word stands; older servers' go.
-- KEYS[1] clock (hash: run id of a server -> microseconds)
-- ARGV[1] run id of this server   ARGV[2] microseconds that are proposed, '' by whoever has no common time yet
-- ARGV[3] those that are to be replaced, since the server's clock has jumped; '' where nothing is
-- Returns what is agreed on, or '' while it is not: somebody may have lived by another server's time, and will say.
local agreed = redis.call('HGET', KEYS[1], ARGV[1])
if agreed and agreed ~= ARGV[3] then return agreed end
if ARGV[2] == '' then return '' end -- also where nothing stands: a server that lost its data is empty, too
redis.call('DEL', KEYS[1])
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
return ARGV[2]
